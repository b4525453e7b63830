"""A VAE decoder fitted to one picture."""
