"""The sample teacher: a small ViLT trained on shapes, shipped so that the demo downloads nothing."""
