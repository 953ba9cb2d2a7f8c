"""Networks by name: those of timm and torchvision, saved ones, and the networks of the CIFAR literature."""
