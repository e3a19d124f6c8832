"""Flow and transitions. These formulas exist only here, so that sampler and learner agree to the bit.

    x_sigma = (1 - sigma) x0 + sigma eps        linear flow; sigma in [0, 1], 1 is pure noise
    v       = eps - x0                          velocity, what every backbone predicts

Sources: the linear flow is rectified flow (arXiv 2209.03003); the transition is coefficient-preserving sampling (CPS,
arXiv 2509.05952); the renoising of a sub-interval and its ambient target are AC-DMD's (arXiv 2605.26108).

Conventions: a noise level (`Sigma`) is a float, or a tensor [B] with one level per sample. Half-precision inputs are
computed in float32; float64 stays float64, so that finite differences work. Shapes and ranges are checked first; a
ValueError names the argument. The values of a tensor on a GPU are not checked, because the check would wait for the
GPU: draw levels on the CPU, where `sample_renoise_level` checks them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from common.renoise_levels import RENOISE_MARGIN, RENOISE_MAX, RENOISE_MIN

Sigma: TypeAlias = float | Tensor


def upcast(tensor: Tensor) -> Tensor:
    """The tensor in the precision of all formulas: float64 unchanged, everything else as float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def require_shapes(rank: int, **tensors: Tensor) -> None:
    """Raise ValueError unless all tensors have one shape, of the given rank. The keyword is the name in the message."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) != 1 or any(len(shape) != rank for shape in shapes.values()):
        listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ValueError(f"expected one common shape of rank {rank}, got {listed}")


def per_sample(value: Sigma, like_Bchw: Tensor, name: str) -> Tensor:
    """A number, or one number per sample, as a tensor that broadcasts over [B, c, h, w].

    Args:
        value: float, or tensor of shape [], [B], [1, 1, 1, 1] or [B, 1, 1, 1].
        like_Bchw: gives B, device and (after `upcast`) dtype.
        name: the value's name in an error.

    Returns: [1, 1, 1, 1] or [B, 1, 1, 1].
    """
    dtype = torch.float64 if like_Bchw.dtype == torch.float64 else torch.float32
    if not isinstance(value, Tensor):
        return torch.full((1, 1, 1, 1), value, dtype=dtype, device=like_Bchw.device)
    batch = like_Bchw.shape[0]
    if tuple(value.shape) not in {(), (batch,), (1, 1, 1, 1), (batch, 1, 1, 1)}:
        raise ValueError(f"{name} has shape {list(value.shape)}: expected a number, or one per sample, [{batch}]")
    return value.to(device=like_Bchw.device, dtype=dtype).reshape(-1, 1, 1, 1)


def holds(condition: Tensor) -> bool:
    """Whether a condition holds for all values; also true on a GPU, whose values are not read."""
    return condition.device.type != "cpu" or bool(condition.all())


def _level(sigma: Sigma, like_Bchw: Tensor, name: str) -> Tensor:
    level = per_sample(sigma, like_Bchw, name)
    # Written so that NaN fails as well.
    inside = holds((sigma >= 0) & (sigma <= 1)) if isinstance(sigma, Tensor) else 0 <= sigma <= 1
    if not inside:
        raise ValueError(f"{name} = {sigma} is not a noise level: it must lie in [0, 1]")
    return level


# ── predictions ──────────────────────────────────────────────────────────────────────────────────────────────────────


def add_noise(clean_Bchw: Tensor, noise_Bchw: Tensor, sigma: Sigma) -> Tensor:
    """x_sigma = (1 - sigma) x0 + sigma eps."""
    require_shapes(4, clean_Bchw=clean_Bchw, noise_Bchw=noise_Bchw)
    level = _level(sigma, clean_Bchw, "sigma")
    return (1 - level) * upcast(clean_Bchw) + level * upcast(noise_Bchw)


def clean_prediction(sample_Bchw: Tensor, velocity_Bchw: Tensor, sigma: Sigma) -> Tensor:
    """x0_hat = x - sigma v."""
    require_shapes(4, sample_Bchw=sample_Bchw, velocity_Bchw=velocity_Bchw)
    return upcast(sample_Bchw) - _level(sigma, sample_Bchw, "sigma") * upcast(velocity_Bchw)


def noise_prediction(sample_Bchw: Tensor, velocity_Bchw: Tensor, sigma: Sigma) -> Tensor:
    """eps_hat = x + (1 - sigma) v."""
    require_shapes(4, sample_Bchw=sample_Bchw, velocity_Bchw=velocity_Bchw)
    return upcast(sample_Bchw) + (1 - _level(sigma, sample_Bchw, "sigma")) * upcast(velocity_Bchw)


# ── one transition ───────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Transition:
    """The Gaussian from which a sampler draws its next state.

    Attributes:
        mean_Bchw: keeps the graph of its velocity.
        std: [1, 1, 1, 1] or [B, 1, 1, 1]; 0 for a deterministic step.
    """

    mean_Bchw: Tensor
    std: Tensor

    def sample(self, noise_Bchw: Tensor) -> Tensor:
        """The next state for this standard normal noise."""
        require_shapes(4, mean_Bchw=self.mean_Bchw, noise_Bchw=noise_Bchw)
        return self.mean_Bchw + self.std * noise_Bchw.to(self.mean_Bchw)


def cps_transition(
    sample_Bchw: Tensor, velocity_Bchw: Tensor, sigma: Sigma, sigma_next: Sigma, eta: float
) -> Transition:
    """One step of coefficient-preserving sampling (arXiv 2509.05952) from sigma down to sigma_next.

        mean = (1 - sigma') x0_hat + sigma' cos(eta pi / 2) eps_hat
        std  = sigma' sin(eta pi / 2)

    eta = 0 is the Euler step, eta = 1 re-noises x0_hat; at sigma' = 0 the result is x0_hat for every eta.

    Raises:
        ValueError: eta or a sigma outside [0, 1], sigma_next not below sigma, or shapes that differ.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta = {eta} must lie in [0, 1]")
    require_shapes(4, sample_Bchw=sample_Bchw, velocity_Bchw=velocity_Bchw)
    level, next_level = _level(sigma, sample_Bchw, "sigma"), _level(sigma_next, sample_Bchw, "sigma_next")
    are_tensors = isinstance(sigma, Tensor) or isinstance(sigma_next, Tensor)
    if not (holds(next_level < level) if are_tensors else sigma_next < sigma):
        raise ValueError(f"sigma_next = {sigma_next} must be below sigma = {sigma}: sampling goes from noise to image")
    clean_Bchw = upcast(sample_Bchw) - level * upcast(velocity_Bchw)
    noise_Bchw = clean_Bchw + upcast(velocity_Bchw)  # v = eps - x0
    angle = eta * math.pi / 2
    mean_Bchw = (1 - next_level) * clean_Bchw + next_level * math.cos(angle) * noise_Bchw
    return Transition(mean_Bchw, next_level * math.sin(angle))


def velocity_coefficient(sigma: float, sigma_next: float, eta: float) -> float:
    """Derivative of a transition's mean with respect to the velocity; negative for eta in [0, 1] and sigma' < sigma."""
    return sigma_next * math.cos(eta * math.pi / 2) * (1 - sigma) - (1 - sigma_next) * sigma


def surrogate_log_density(mean_Bchw: Tensor, next_sample_Bchw: Tensor) -> Tensor:
    """-mean_chw (x' - mean)^2, shape [B].

    This is the Gaussian log-density times 2 std^2 / d without its constant. Its gradient is bounded however small std
    is, and it is not a log-probability.
    """
    require_shapes(4, mean_Bchw=mean_Bchw, next_sample_Bchw=next_sample_Bchw)
    return -(upcast(next_sample_Bchw) - upcast(mean_Bchw)).square().mean(dim=(1, 2, 3))


def gaussian_log_density(mean_Bchw: Tensor, std: Sigma, next_sample_Bchw: Tensor) -> Tensor:
    """The exact log N(x'; mean, std^2 I), summed over c, h, w; shape [B].

    Raises:
        ValueError: a std that is not positive: a deterministic step has no density.
    """
    require_shapes(4, mean_Bchw=mean_Bchw, next_sample_Bchw=next_sample_Bchw)
    width = per_sample(std, mean_Bchw, "std")
    if not holds(width > 0):
        raise ValueError(f"std = {std} must be positive: a deterministic step has no density")
    standardised_Bchw = (upcast(next_sample_Bchw) - upcast(mean_Bchw)) / width
    density_Bchw = -0.5 * standardised_Bchw.square() - width.log() - 0.5 * math.log(2 * math.pi)
    return density_Bchw.sum(dim=(1, 2, 3))


# ── the sub-interval [s, t] of ambient-consistent distribution matching ──────────────────────────────────────────────


def sample_renoise_level(uniform_B: Tensor, sigma_start: Sigma) -> Tensor:
    """The renoise level t of each sample, shape [B]: uniform in [s + 0.01, 1], clamped to [0.02, 0.98].

    Raises:
        ValueError: sigma_start so high that the clamp would put t within 0.01 of it.
    """
    require_shapes(1, uniform_B=uniform_B)
    start_B = _level(sigma_start, uniform_B, "sigma_start").flatten()
    lowest_B = start_B + RENOISE_MARGIN
    if not holds(lowest_B <= RENOISE_MAX):
        raise ValueError(
            f"sigma_start = {sigma_start} leaves no room to renoise below {RENOISE_MAX}: use a schedule whose second "
            f"sigma is at most {RENOISE_MAX - RENOISE_MARGIN:.2f}"
        )
    return (lowest_B + (1 - lowest_B) * upcast(uniform_B)).clamp(RENOISE_MIN, RENOISE_MAX)


def renoise_coefficients(start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """a and w of the forward kernel x_t = a x_s + w z.

        a = (1 - t) / (1 - s),    w^2 = t^2 - a^2 s^2

    w^2 is computed as the product (t - a s)(t + a s) with t - a s = (t - s) / (1 - s), which loses no digits when t is
    close to s.
    """
    if not holds(end > start):
        raise ValueError(f"sigma_end = {end.flatten()} must be above sigma_start = {start.flatten()}")
    keep = (1 - end) / (1 - start)
    return keep, ((end - start) / (1 - start) * (end + keep * start)).sqrt()


def renoise(x_start_Bchw: Tensor, noise_Bchw: Tensor, sigma_start: Sigma, sigma_end: Sigma) -> Tensor:
    """Renoise x_s at sigma_start = s to x_t = a x_s + w z at sigma_end = t > s."""
    require_shapes(4, x_start_Bchw=x_start_Bchw, noise_Bchw=noise_Bchw)
    start, end = _level(sigma_start, x_start_Bchw, "sigma_start"), _level(sigma_end, x_start_Bchw, "sigma_end")
    keep, scale = renoise_coefficients(start, end)
    return keep * upcast(x_start_Bchw) + scale * upcast(noise_Bchw)


def ambient_target(
    x_start_Bchw: Tensor, noise_Bchw: Tensor, sigma_start: Sigma, sigma_end: Sigma
) -> tuple[Tensor, Tensor]:
    """Target of a velocity at x_t when only x_s is known (AC-DMD, arXiv 2605.26108), times w.

        v* = -x_s / (1 - s) + z (t + (1 - t) s^2 / (1 - s)^2) / w

    Its mean given x_t is the flow's velocity E[eps - x0 | x_t]; at s = 0 it is z - x0. The variance grows like
    (s / (1 - s))^2, and 1 / w diverges as t nears s, hence the scaled form.

    Returns: (w v*, w), shapes [B, c, h, w] and [1, 1, 1, 1] or [B, 1, 1, 1].
    """
    require_shapes(4, x_start_Bchw=x_start_Bchw, noise_Bchw=noise_Bchw)
    start, end = _level(sigma_start, x_start_Bchw, "sigma_start"), _level(sigma_end, x_start_Bchw, "sigma_end")
    keep, scale = renoise_coefficients(start, end)
    noise_factor = end + keep * start.square() / (1 - start)
    return noise_factor * upcast(noise_Bchw) - scale / (1 - start) * upcast(x_start_Bchw), scale


# ── schedules ────────────────────────────────────────────────────────────────────────────────────────────────────────


def shift_static(raw: float, shift: float) -> float:
    """SD3's shift s u / (1 + (s - 1) u) (arXiv 2403.03206, equation 23) of a raw step u in [0, 1]."""
    return shift * raw / (1 + (shift - 1) * raw)


def shift_exponential(raw: float, mu: float) -> float:
    """FLUX's shift e^mu / (e^mu + 1 / u - 1) of a raw step u in [0, 1]: `shift_static` with s = e^mu."""
    return shift_static(raw, math.exp(mu))


def _raw_steps(num_steps: int) -> list[float]:
    if num_steps < 1:
        raise ValueError(f"num_steps = {num_steps} must be at least 1")
    return [(num_steps - step) / num_steps for step in range(num_steps + 1)]


def static_shift_sigmas(num_steps: int, shift: float) -> tuple[float, ...]:
    """N + 1 levels from 1 to 0 under SD3's shift: 4 steps at shift 3 give 1, 0.9, 0.75, 0.5, 0."""
    if not shift > 0:
        raise ValueError(f"shift = {shift} must be positive")
    return tuple(shift_static(raw, shift) for raw in _raw_steps(num_steps))


def exponential_shift_sigmas(num_steps: int, mu: float) -> tuple[float, ...]:
    """N + 1 levels from 1 to 0 under FLUX's shift."""
    return tuple(shift_exponential(raw, mu) for raw in _raw_steps(num_steps))


def flux2_mu(image_tokens: int, num_steps: int) -> float:
    """mu of FLUX.2's shift: a line in the token count, itself interpolated between a 10-step and a 200-step line.

    The four numbers are FLUX.2's published fit. Above 4300 tokens it uses the 200-step line for any step count.
    """
    mu_200_steps = 0.00016927 * image_tokens + 0.45666666
    if image_tokens > 4300:
        return mu_200_steps
    mu_10_steps = 8.73809524e-05 * image_tokens + 1.89833333
    return mu_10_steps + (mu_200_steps - mu_10_steps) * (num_steps - 10) / 190


def linear_mu(image_tokens: int, *, tokens: tuple[int, int], shifts: tuple[float, float]) -> float:
    """mu of FLUX.1's shift: the line through (tokens[0], shifts[0]) and (tokens[1], shifts[1]).

    Its published points are 256 -> 0.5 and 4096 -> 1.15.
    """
    return shifts[0] + (shifts[1] - shifts[0]) * (image_tokens - tokens[0]) / (tokens[1] - tokens[0])
