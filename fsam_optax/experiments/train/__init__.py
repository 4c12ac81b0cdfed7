"""One real run: a network on CIFAR or your own images, as the paper trains it.

The command (``start``) reads its flags (``settings``), loads the images
(``rows``), completes the configuration (``config``), builds the step
(``program``) and trains each seed (``loop``) in a folder, from which the same
command goes on.
"""
