import pytest
import torch
from torch import nn

from clipdense.engine.ema import ModelEMA


def make() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].bias.requires_grad_(False)
    return model


def test_average() -> None:
    model = make()
    ema = ModelEMA(model, decay=0.5)
    expected = model[0].weight.detach().clone()
    for t in range(5):
        with torch.no_grad():
            model[0].weight.add_(1.0)
            model[1].running_mean.add_(1.0)
        decay = min(0.5, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * model[0].weight.detach()
        ema.update(t)
        torch.testing.assert_close(ema.average["0.weight"], expected)
    assert 0 < float(ema.average["1.running_mean"][0]) < 5  # statistics of norms are averaged as well
    assert set(ema.average) == {"0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var"}


def test_applied_and_back() -> None:
    model = make()
    ema = ModelEMA(model, decay=0.9)
    with torch.no_grad():
        model[0].weight.fill_(3.0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    average = {k: v.clone() for k, v in ema.average.items()}
    with pytest.raises(RuntimeError), ema.applied():
        assert torch.equal(model[0].weight, average["0.weight"])
        raise RuntimeError
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, average[k]) for k, v in ema.average.items())
    ema.load(model.state_dict())
    assert torch.equal(ema.average["0.weight"], model[0].weight)


def test_decay_outside_its_range() -> None:
    with pytest.raises(ValueError, match="between 0 and 1, got 1.0"):
        ModelEMA(make(), 1.0)
