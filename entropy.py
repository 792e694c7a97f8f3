"""Action entropy of a policy from samples alone: Kozachenko and Leonenko's k-NN estimator.

How many different things does the policy still do in a state? A steered decoder has no density to
integrate, but where its samples lie close together the density is high. For K samples a_1 .. a_K in
R^D of the policy at one state (LP-DS, appendix C, equation 12; the mean over B probe states is
equation 11):

    H = -psi(k) + psi(K) + log c_D + D/K * sum_i log(rho_i + eps)

rho_i   Euclidean distance from a_i to its k-th nearest neighbour, a_i itself not counted
c_D     volume of the unit ball in R^D;  psi  digamma function
k       neighbours: more gives a little less variance and more bias, and blurs structure finer than
        rho
K       samples: the formula takes the density as flat within rho, which shrinks only as K^(-1/D).
        A unit Gaussian comes out too high by 1.4, 1.0, 0.6, 0.3 nats at K = 32, 64, 256, 1024
        (D = 12, k = 5; 2.7 at D = 24 and K = 256)
eps     keeps the logarithm finite where samples coincide; biases H upwards, by
        D * eps * mean(1/rho) while small

The paper states neither k, nor K, nor eps. H is in nats of one flattened chunk. It is a
differential entropy: it may be negative, and H(c * A) = H(A) + D log c, so only values with the
same D, K, k, eps, action scale and probe states compare. Read the difference from the frozen
decoder rather than the number.

Ties. Decoded actions are clipped to +-1, so exact duplicates occur, and a distribution with such
atoms has entropy -infinity: with k duplicates one adds D/K log eps, our choice and no property of
the policy. `ties` is the share of samples with rho < eps, where eps outweighs the data; unless
it is near 0, quote it beside the entropy. It does not see samples clipped in some coordinates only:
they lie on a face of the box, where H falls without end as K grows.

Source: L. F. Kozachenko and N. N. Leonenko, Sample estimate of the entropy of a random vector,
Problems of Information Transmission 23(2), 1987.
"""

import math

import torch

MAX_DISTANCES = 2**24  # pairwise distances held at a time: 128 MiB of float64


@torch.no_grad()  # no loss: the gradient of a distance is undefined where samples coincide
def knn_entropy(
    samples: torch.Tensor, k: int = 5, eps: float = 1e-3
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean entropy in nats and share of ties of `samples`, K at each of B states.

    samples is (B, K, D) or (B, K, Ta, A). Returns two 0-d float64 tensors on its device, and reads
    nothing back from it: values are not checked, a NaN among the samples makes the entropy NaN.
    With eps = 0 ties is 0, and k duplicates of a sample make the entropy -inf.
    """
    if samples.ndim < 3 or 0 in samples.shape:
        expected = "(B, K, D) or (B, K, Ta, A), not empty"
        raise ValueError(f"samples: found shape {tuple(samples.shape)}, expected {expected}")
    if not samples.is_floating_point():
        raise ValueError(f"samples: found dtype {samples.dtype}, expected a floating point one")
    if k < 1 or samples.shape[1] <= k:
        found = f"found {k} with K = {samples.shape[1]} samples per state"
        raise ValueError(f"k: {found}, expected 1 <= k < K")
    if not eps >= 0:
        raise ValueError(f"eps: found {eps}, expected a distance >= 0")

    samples = samples.flatten(2)  # (B, K, D)
    num_samples, dim = samples.shape[1:]

    # Distance to the k-th neighbour. Differences are taken coordinate by coordinate: the faster
    # |a|^2 - 2ab + |b|^2 of matrix products cancels for near-duplicates, where log(rho) counts most
    rho = []
    for a in samples.split(max(1, MAX_DISTANCES // num_samples**2)):
        a = a.double()
        distance = torch.cdist(a, a, compute_mode="donot_use_mm_for_euclid_dist")  # (b, K, K)
        # k + 1 smallest, because the nearest is the sample itself at exactly 0
        rho.append(distance.topk(k + 1, largest=False).values[..., k])
    rho = torch.cat(rho)  # (B, K)

    # psi(K) - psi(k), exact for integers
    psi_difference = sum(1 / i for i in range(k, num_samples))
    log_unit_ball = dim / 2 * math.log(math.pi) - math.lgamma(dim / 2 + 1)  # log c_D
    entropy = psi_difference + log_unit_ball + dim * (rho + eps).log().mean()
    return entropy, (rho < eps).double().mean()
