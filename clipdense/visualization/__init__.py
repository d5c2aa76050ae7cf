"""Pictures of predictions, ground truth, score maps, clusters and training curves."""
