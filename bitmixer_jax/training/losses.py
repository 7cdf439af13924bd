"""Losses: cross-entropy and distillation, averaged over the examples of a batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    r"""Computes the mean cross-entropy of logits against labels.

    .. math::
        -\frac{1}{B} \sum_{i} \sum_{k} t_{ik} \log \mathrm{softmax}(z_i)_k, \quad
        t_{ik} = (1 - \epsilon) [k = y_i] + \epsilon / K

    Args:
      logits: z, float32 ``[B, K]``.
      labels: y, int32 ``[B]``, in 0..K-1.
      smoothing: epsilon, 0 <= epsilon < 1, the share of the target that is spread evenly over all
        classes (label smoothing).

    Returns:
      scalar float32, in nats.

        >>> cross_entropy(jnp.zeros((1, 4)), jnp.array([2])).round(3)
        Array(1.386, dtype=float32)

    Reference: Szegedy et al., Rethinking the Inception Architecture, CVPR 2016.
    """
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return jnp.mean(optax.softmax_cross_entropy(logits, targets))


def distillation(
    student_logits: jax.Array, teacher_logits: jax.Array, temperature: float
) -> jax.Array:
    r"""Computes the mean divergence of the student's distribution from the teacher's.

    .. math::
        \frac{T^2}{B} \sum_i \mathrm{KL}\left(
        \mathrm{softmax}(t_i / T) \,\Vert\, \mathrm{softmax}(z_i / T)\right)

    The factor T^2 keeps the size of the gradient the same for all temperatures. No gradient
    reaches the teacher's logits.

    Args:
      student_logits: z, float32 ``[B, K]``.
      teacher_logits: t, float32 ``[B, K]``.
      temperature: T > 0; both distributions are softened by it.

    Returns:
      scalar float32, in nats; 0 where both distributions are equal.

        >>> logits = jnp.array([[0.0, 1.0]])
        >>> float(distillation(logits, logits, 2.0))
        0.0

    Reference: Hinton et al., Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531.
    """
    # The teacher may be the same network at its widest policy: it must not learn from the student.
    target = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_logits) / temperature)
    log_probs = jax.nn.log_softmax(student_logits / temperature)
    return temperature**2 * jnp.mean(jnp.sum(jnp.exp(target) * (target - log_probs), axis=-1))
