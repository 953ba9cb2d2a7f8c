"""Networks by name: from timm and torchvision, from saved folders, and ResNet and VGG for CIFAR."""
