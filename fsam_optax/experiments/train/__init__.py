"""One real run: a network on CIFAR or your own images, as the paper trains it.

The command (``main``) reads its flags (``flags_and_recipes``), loads the images
(``image_rows``), completes the configuration (``flag_checks``), builds the step
(``program``) and trains each seed (``loop``) in a folder, from which the same
command goes on.
"""
