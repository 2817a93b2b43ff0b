"""Multi-head latent attention over selected keys, forward and backward."""
