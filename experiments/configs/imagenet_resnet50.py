"""ImageNet with ResNet-50: the paper's protocol, 160 epochs in all, widths {2, 3, 4}.

    bitmixer train --config experiments/configs/imagenet_resnet50.py --workdir runs/in50 \\
        --config.data_dir=data
    bitmixer evaluate --workdir runs/in50 --random 100

The epochs of each stage are our choice. The variant :float trains a full-precision baseline for 90
epochs. To start from it, add --config.init_from=WORKDIR. Published for widths by layer (reported):
75.2 / 74.8 / 72.1% at 4 / 3 / 2 bits. No run of this configuration has been made.

Hardware and time are an ESTIMATE from figures of others: one A100 and 5 CPU cores, 22 to 33 hours
(docs/imagenet.md has the arithmetic).
"""

from bitmixer_jax.training import baseline_config, default_config


def get_config(variant=""):
    config = default_config()
    config.dataset = "imagenet"
    config.test_split = "validation"
    config.stream.decoder = "turbo"  # the fastest of experiments/results/decoders
    config.flip = True
    config.model.name = "resnet50"
    config.batch_size = 256
    config.stages.activations.epochs = 32.0
    config.stages.weights.epochs = 48.0
    config.stages.mixed.epochs = 80.0
    config.evaluate_every = 10.0
    config.evaluate_batch = 250
    config.checkpoint_seconds = 600.0
    config.log_every = 100
    if variant == "float":
        return baseline_config(config, epochs=90.0)
    config.model.compute_dtype = "bfloat16"  # exact for codes
    return config
