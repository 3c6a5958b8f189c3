core_version: str
