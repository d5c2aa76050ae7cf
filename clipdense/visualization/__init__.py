"""Pictures: panels of predictions, score maps, training curves, clusters."""
