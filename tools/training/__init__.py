"""Making the detector: dataset, augmentation, synthetic plates, network, losses, training loop, export."""
