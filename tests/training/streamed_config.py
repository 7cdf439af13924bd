"""StreamingDataset pictures with the smallest network: steps take milliseconds."""

from bitmixer_jax.training import baseline_config, default_config


def get_config(variant=""):
    config = default_config()
    config.dataset = "folder:pictures"
    config.test_split = "validation"
    config.stream.size = 16
    config.stream.resize = 20
    config.flip = True
    config.batch_size = 8
    config.model.width = 4
    config.workers = 0
    config.evaluate_every = 0.0
    config.evaluate_batch = 8
    config.evaluate_random = 2
    config.report_random = 3
    config.log_every = 1
    config.stages.activations.epochs = 0.5
    config.stages.weights.epochs = 1.0
    config.stages.mixed.epochs = 10.0
    config.stages.mixed.rho_start = 1.0
    if variant == "float":
        return baseline_config(config, epochs=2.0)
    return config
