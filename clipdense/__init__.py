"""CLIP per pixel and per region, for Detectron2."""
