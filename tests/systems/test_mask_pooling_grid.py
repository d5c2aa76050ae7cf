"""The search for the ensemble's weights runs the network once and gives the results of separate runs."""

from dataclasses import replace

import torch

from clipdense.clip.vocabulary import Vocabulary
from clipdense.systems.mask_pooling.grid import evaluate_grid, weight_grid
from tests.helpers.fcclip import build_fcclip, fcclip_batch, small_fcclip_config

from detectron2.evaluation import DatasetEvaluator


class Keep(DatasetEvaluator):
    """Keeps the semantic maps."""

    def reset(self):
        self.maps = []

    def process(self, inputs, outputs):
        self.maps += [output["sem_seg"] for output in outputs]

    def evaluate(self):
        return {"maps": self.maps}


def test_each_pair_has_the_results_of_its_own_run():
    model = build_fcclip(small_fcclip_config()).eval()
    model.set_vocabulary(Vocabulary.from_names(["red star", "grass", "green heart"]))
    forwards = []
    model.backbone.register_forward_hook(lambda *_: forwards.append(1))
    grid = weight_grid([0.0, 0.5], [0.2, 1.0])
    assert len(grid) == 4
    batch = fcclip_batch()
    results = evaluate_grid(model, [batch], {pair: Keep() for pair in grid})
    assert len(forwards) == 1
    for alpha, beta in grid:
        other = replace(model.ensemble, alpha=alpha, beta=beta)
        model.ensemble, before = other, model.ensemble
        with torch.no_grad():
            expected = [output["sem_seg"] for output in model(batch)]
        model.ensemble = before
        for ours, theirs in zip(results[alpha, beta]["maps"], expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    first, last = (results[grid[i]]["maps"][0] for i in (0, -1))
    assert not torch.allclose(first, last)


def test_without_base_classes_alpha_is_not_searched():
    assert weight_grid([0.0, 0.5], [0.2, 1.0], base_known=False) == [(0.0, 0.2), (0.0, 1.0)]
