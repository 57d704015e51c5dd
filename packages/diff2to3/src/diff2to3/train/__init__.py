"""Training: five stages, one engine."""
