"""Muon: gradient descent with momentum, whose update of each layer is the nearest orthogonal matrix.

A plain update is dominated by a few directions, in which the gradient is large (singular vectors of its matrix). Muon
gives all directions the same size, so the others are learnt, too (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon). Learning rate and weight decay mean what they mean to AdamW (Liu et al.
2025, arXiv 2502.16982). Keras' own Muon leaves convolutions to AdamW.
"""

import keras
import tensorflow as tf

MOMENTUM = 0.95
POLYNOMIAL = 3.4445, -4.7750, 2.0315  # a, b, c of Jordan et al.: a s + b s^3 + c s^5 moves each s in (0, 1] to about 1
STEP_SIZE = 0.2  # root mean square of the change of a weight at a learning rate of 1; AdamW's is about that


class Muon(keras.optimizers.Optimizer):
    """Arguments: learning_rate (a number or a Keras schedule) and weight_decay."""

    def build(self, variables):
        if not self.built:
            super().build(variables)
            self.momentums = [self.add_variable_from_reference(v, "momentum") for v in variables]

    def update_step(self, gradient, variable, learning_rate):
        """Keras calls this for each variable, after the weight decay."""
        momentum = self.momentums[self._get_variable_index(variable)]
        self.assign(momentum, MOMENTUM * momentum + gradient)
        update = gradient + MOMENTUM * momentum  # Nesterov momentum
        matrix = tf.reshape(update, [-1, variable.shape[-1]])  # a kernel: (27 * inputs, outputs); a bias: one row
        scale = learning_rate * STEP_SIZE * max(matrix.shape) ** 0.5
        self.assign_sub(variable, scale * tf.reshape(orthogonalise(matrix), variable.shape))


def orthogonalise(matrix, iterations=5):
    """About U V^T of a matrix U S V^T: a polynomial of the matrix moves its singular values S to 0.7 to 1.2 (not 0).

    The iterations need only its small Gram matrix, since all of its polynomials commute.
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = tf.transpose(matrix) if is_tall else matrix
    x /= tf.norm(x) + 1e-7  # no singular value is above 1
    gram = tf.matmul(x, x, transpose_b=True)
    product = identity = tf.eye(x.shape[0])
    a, b, c = POLYNOMIAL
    for _ in range(iterations):
        polynomial = a * identity + b * gram + c * tf.matmul(gram, gram)
        product, gram = tf.matmul(polynomial, product), tf.matmul(polynomial, tf.matmul(gram, polynomial))
    result = tf.matmul(product, x)
    return tf.transpose(result) if is_tall else result
