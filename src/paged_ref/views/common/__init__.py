"""What the views share: a canvas, keys, plots, printing."""
