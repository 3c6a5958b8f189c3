"""The optimizer under its old import path: ``q_galore_torch.q_galore_adamw8bit.AdamW8bit``.

``F`` was bitsandbytes' functional module, which launchers replace before use to make the public package run with newer
bitsandbytes. Nothing here reads it, so whatever they assign does nothing.
"""

from __future__ import annotations

from typing import Any

from q_galore_torch.optim import QGaLoreAdamW8bit

AdamW8bit = QGaLoreAdamW8bit
F: Any = None

# axolotl gives a class without this mark the constructor of bitsandbytes' optimizer (where bitsandbytes >= 0.50 is
# installed), which this one is not.
AdamW8bit._axolotl_bnb050_patched = True  # type: ignore[attr-defined]

__all__ = ["AdamW8bit", "F"]
