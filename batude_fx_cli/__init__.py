"""The command line of batude_fx, a package of its own so that `batude-fx --help` does not import torch."""
