"""The public Q-GaLore code's helper modules under their old import names."""
