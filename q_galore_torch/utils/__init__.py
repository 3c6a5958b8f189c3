"""The public Q-GaLore's import paths: thin adapters over :mod:`q_galore_torch.nn`."""
