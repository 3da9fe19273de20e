"""A model read layer by layer answers as the whole one, and never has more than a layer in memory."""

import pytest
import torch
from conftest import save_random_adapter

from minilora.adapters import format as adapter_format
from minilora.adapters import layerwise
from minilora.models.probe import probe_logits

IDS = [5, 17, 3, 99, 1, 42]


@pytest.fixture
def adapted(tmp_path, load_tiny):
    """A function: (its folder, the model with it) of an adapter with random values."""

    def make(rslora=False, dora=False, targets=("q_proj", "v_proj", "down_proj")):
        model = load_tiny()
        save_random_adapter(model, tmp_path / "adapter", "base", targets, std=0.2, rslora=rslora, dora=dora)
        return tmp_path / "adapter", model.eval()

    return make


def test_a_base_as_the_whole_model(tiny_folder, load_tiny):
    expected = probe_logits(load_tiny(), IDS)
    torch.testing.assert_close(layerwise.layerwise_logits(tiny_folder, IDS), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", [{}, {"rslora": True}, {"dora": True}])
def test_an_adapter_as_on_the_whole_model(tiny_folder, load_tiny, adapted, variant):
    folder, model = adapted(**variant)
    config, updates = adapter_format.read(load_tiny(), folder, adapter_format.read_metadata(folder)["base_fingerprint"])
    found = layerwise.layerwise_logits(tiny_folder, IDS, config, updates)
    torch.testing.assert_close(found, probe_logits(model, IDS), rtol=0, atol=1e-5)
    assert (found - probe_logits(load_tiny(), IDS)).abs().max() > 0.1


def test_only_a_layer_is_there_at_a_time(tiny_folder, monkeypatch):
    """Every part is on the meta device again when the next one is loaded."""
    models = []
    build = layerwise.empty_model
    monkeypatch.setattr(layerwise, "empty_model", lambda *args: models.append(build(*args)) or models[-1])
    read, loaded = layerwise.read_tensor, []

    def watched(file, name):
        there = {key.rsplit(".", 3)[0] for key, param in models[0].named_parameters() if not param.is_meta}
        loaded.append(there)
        return read(file, name)

    monkeypatch.setattr(layerwise, "read_tensor", watched)
    layerwise.layerwise_logits(tiny_folder, IDS)
    assert len(loaded) > 10
    assert not any(loaded)
