"""The public Q-GaLore's helper modules under their import names: thin adapters."""
