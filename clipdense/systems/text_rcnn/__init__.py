"""R-CNN whose box classifier is a frozen table of class-name embeddings (ViLD-text)."""

from clipdense.systems.text_rcnn.config import add_text_rcnn_config
from clipdense.systems.text_rcnn.predictor import TextBoxPredictor
from clipdense.systems.text_rcnn.roi_heads import TextROIHeads

__all__ = ["TextBoxPredictor", "TextROIHeads", "add_text_rcnn_config"]
