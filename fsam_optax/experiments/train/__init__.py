"""One real run: a network on CIFAR or your own images, as the paper trains it.

The command reads a configuration (``config``, ``recipes``), loads the images
(``data``), says what it would do (``plan``), compiles the step (``program``)
and trains each seed (``loop``) in a folder that it goes on from after any end.
"""
