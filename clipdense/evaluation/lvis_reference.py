"""LVIS's rules on pycocotools' matcher: the reference for hotcoco, as lvis-api fails on current NumPy."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

__all__ = ["FederatedCOCOeval"]


class FederatedCOCOeval(COCOeval):
    """COCO's matching for images annotated with some classes only (LVIS, arXiv:1908.03195, section 3).

    1. A detection is evaluated only if its class is in the image's ground truth or ``neg_category_ids``.
    2. A detection without a match is ignored if its class is in the image's ``not_exhaustive_category_ids``.
    3. The limit on detections is per image over all classes; the caller must apply it.
    """

    def _prepare(self) -> None:
        super()._prepare()
        images = self.cocoGt.imgs
        present: dict[int, set[int]] = defaultdict(set)
        for (image_id, category_id), found in self._gts.items():
            if found:
                present[image_id].add(category_id)
        for image_id, category_id in list(self._dts):
            evaluated = present[image_id] | set(images[image_id].get("neg_category_ids", ()))
            if category_id not in evaluated:
                del self._dts[image_id, category_id]

    def evaluateImg(self, imgId: int, catId: int, aRng: Any, maxDet: int) -> dict[str, Any] | None:
        """Match one image and class; see pycocotools."""
        result: dict[str, Any] | None = super().evaluateImg(imgId, catId, aRng, maxDet)
        if result and catId in self.cocoGt.imgs[imgId].get("not_exhaustive_category_ids", ()):
            result["dtIgnore"] = np.logical_or(result["dtIgnore"], result["dtMatches"] == 0)
        return result
