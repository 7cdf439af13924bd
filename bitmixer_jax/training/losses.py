"""Losses: cross-entropy and distillation, averaged over the examples of a batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Mean cross-entropy of logits ``[B, K]`` against labels int32 ``[B]``, in nats: a scalar.

    Args:
      smoothing: share of the target that is spread evenly over all classes (label smoothing).
    """
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return jnp.mean(optax.softmax_cross_entropy(logits, targets))


def distillation(logits: jax.Array, teacher: jax.Array, temperature: float) -> jax.Array:
    """Mean ``T^2 KL(teacher || student)`` of distributions softened by T: a scalar, in nats.

    No gradient reaches the teacher's logits ``[B, K]``. T^2 keeps the gradient's size
    (Hinton et al., 2015).
    """
    target = jax.nn.log_softmax(jax.lax.stop_gradient(teacher) / temperature)
    log_probs = jax.nn.log_softmax(logits / temperature)
    return temperature**2 * jnp.mean(jnp.sum(jnp.exp(target) * (target - log_probs), axis=-1))
