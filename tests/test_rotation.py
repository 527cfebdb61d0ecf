"""The experiment that turns the bases of heads leaves the function of every family as it is."""

import copy
from pathlib import Path

import pytest
import torch

import tiny


@pytest.mark.parametrize("by_data", [False, True])
def test_rotated_heads_compute_the_same_and_strongest_dimensions_come_first(
    family, by_data, tiny_model_dir, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import rotation

    batches = [tiny.random_batch(family, seed=seed) for seed in range(3)]
    found = rotation.write_rotated(tiny_model_dir(family), tmp_path / "rotated", batches, by_data=by_data)
    assert found["max_rel_state_diff"] < 1e-4

    plain = rotation.losses_at_half(tiny_model_dir(family), batches)
    turned = rotation.losses_at_half(tmp_path / "rotated", batches)
    if by_data:  # these are the moments it was turned by, so nothing loses less
        assert turned["qk"] < plain["qk"]
        assert turned["vo"] < plain["vo"]

    model = tiny.build_encoder(family)
    moments = rotation.second_moments(model, batches) if by_data else None
    once = copy.deepcopy(model)
    rotation.rotate_(once, moments)
    layer = rotation.resolve(once)[0]
    for _, _, pair in rotation.heads_of(once, layer, None if moments is None else moments[0]):
        first, second = pair.weighted()
        for gram in (first @ first.T, second @ second.T):  # both diag(s), largest first
            assert torch.allclose(gram, gram.diagonal().diag(), atol=1e-3 * float(gram.max()))
            assert (gram.diagonal().diff() < 1e-3 * gram.max()).all()
