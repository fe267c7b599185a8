"""What a denoiser learns: how latents are noised, what it must say of them, what each error weighs.

The formulas are those of the training scripts of diffusers 0.42.1
(examples/text_to_image/train_text_to_image_lora.py and _sdxl, examples/dreambooth/
train_dreambooth_lora_flux.py and _sd3), noise and timesteps drawn in their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional

from hf_lora.errors import InvalidOption, UnsupportedHost, listing, shown

FLOW = "flow"


@dataclass(frozen=True)
class Noised:
    """Latents on the way to noise, and what a denoiser should make of them.

    Attributes:
        noisy: Latents with noise, (batch, channels, height, width).
        timesteps: Of each, (batch,), in the scheduler's own count: 0 to its training steps.
        target: What is to be predicted, shaped as the latents.
        weights: What the error of each counts, (batch,); None where all count the same.
    """

    noisy: Tensor
    timesteps: Tensor
    target: Tensor
    weights: Tensor | None


@dataclass(frozen=True)
class Prediction:
    """What a denoiser of the older kind predicts.

    Attributes:
        target: (scheduler, latents, noise, timesteps) -> what is to be predicted.
        weight: (signal-to-noise ratio, gamma) -> min-SNR weight, each of shape (batch,).
    """

    target: Callable[[Any, Tensor, Tensor, Tensor], Tensor]
    weight: Callable[[Tensor, float], Tensor]


# Section 3.4 of arXiv 2303.09556: min(SNR, gamma) for a predicted picture. Noise is off by a factor
# of SNR, velocity by SNR + 1. The first form is min(SNR, gamma) / SNR and holds for SNR 0 as well.
PREDICTIONS: Mapping[str, Prediction] = {
    "epsilon": Prediction(
        lambda scheduler, latents, noise, steps: noise,
        lambda snr, gamma: (gamma / snr).clamp(max=1.0),
    ),
    "v_prediction": Prediction(
        lambda scheduler, latents, noise, steps: scheduler.get_velocity(latents, noise, steps),
        lambda snr, gamma: snr.clamp(max=gamma) / (snr + 1),
    ),
}


def _uniform(count: int, generator: Generator | None) -> Tensor:
    return torch.rand(count, generator=generator)


def _logit_normal(count: int, generator: Generator | None) -> Tensor:
    return torch.normal(0.0, 1.0, (count,), generator=generator).sigmoid()


def _mode(count: int, generator: Generator | None) -> Tensor:
    u = torch.rand(count, generator=generator)
    return 1 - u - 1.29 * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)


# Places on the way to noise, 0 to 1, (batch,): arXiv 2403.03206, section 3.1, with the scripts'
# defaults (mean 0, deviation 1, scale 1.29).
SAMPLINGS: Mapping[str, Callable[[int, Generator | None], Tensor]] = {
    "uniform": _uniform,
    "logit_normal": _logit_normal,
    "mode": _mode,
}

# What the error at a sigma counts. `preconditioned` is what the script of SD3 does by default: it
# compares pictures, noisy - sigma * prediction with the clean one, which is sigma times the error
# of the velocity.
WEIGHTINGS: Mapping[str, Callable[[Tensor], Tensor] | None] = {
    "none": None,
    "sigma_sqrt": lambda sigma: sigma**-2.0,
    "cosmap": lambda sigma: 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2)),
    "preconditioned": lambda sigma: sigma**2,
}


def chosen(field: str, value: object, there: Mapping[str, Any]) -> str:
    """Returns the value when it is one of those there are; else raises InvalidOption."""
    if not isinstance(value, str) or value not in there:
        raise InvalidOption(
            f"{field}={shown(value)} is none of {listing(there)}",
            fix=f"Give one of them: {field}={next(iter(there))!r}.",
            field=field,
        )
    return value


def number(field: str, value: object, *, least: float, most: float = math.inf) -> float:
    """Returns a finite number within its bounds; else raises InvalidOption."""
    sound = isinstance(value, int | float) and not isinstance(value, bool)
    if not sound or not math.isfinite(value) or not least <= value <= most:  # type: ignore[operator,arg-type]
        until = f" to {most}" if math.isfinite(most) else " or more"
        raise InvalidOption(f"{field}={shown(value)} is no number of {least}{until}", field=field)
    return float(value)  # type: ignore[arg-type]


class DiffusionNoise:
    """Noises latents as DDPM does, for denoisers that predict the noise or the velocity.

    Args:
        config: Of the pipeline's scheduler; what its sampler does beside the betas is left out.
        prediction: A row of `PREDICTIONS`; None for the config's.
        min_snr_gamma: Gamma of min-SNR weights; None for none.
        noise_offset: How much of one random value for each channel is added to the noise.

    Raises:
        InvalidOption: A value cannot work.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        prediction: str | None = None,
        min_snr_gamma: float | None = None,
        noise_offset: float = 0.0,
    ) -> None:
        from diffusers import DDPMScheduler

        asked = config.get("prediction_type", "epsilon") if prediction is None else prediction
        self.prediction = chosen("prediction", asked, PREDICTIONS)
        # the pipeline's own may count noise otherwise: Euler's samplers do
        made: Any = DDPMScheduler
        self.scheduler = made.from_config(config, prediction_type=self.prediction)
        self._gamma = min_snr_gamma
        if min_snr_gamma is not None:
            self._gamma = number("min_snr_gamma", min_snr_gamma, least=1e-3)
        self._offset = number("noise_offset", noise_offset, least=0.0)

    def __call__(self, latents: Tensor, generator: Generator | None = None) -> Noised:
        """Noises latents (batch, channels, height, width).

        Args:
            latents: Clean, scaled as the denoiser sees them.
            generator: On the CPU; None for torch's global ones.
        """
        noise = noise_like(latents, generator)
        if self._offset:
            each = latents.new_empty((*latents.shape[:2], 1, 1))
            noise = noise + self._offset * noise_like(each, generator)
        where = latents.device if generator is None else torch.device("cpu")
        count = self.scheduler.config["num_train_timesteps"]
        steps = torch.randint(0, count, (len(latents),), device=where, generator=generator)
        return self.at(latents, noise, steps.to(latents.device))

    def at(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Noised:
        """Returns what latents and noise are at given timesteps, whole numbers (batch,)."""
        row = PREDICTIONS[self.prediction]
        weights = None
        if self._gamma is not None:
            weights = row.weight(self.signal_to_noise(timesteps), self._gamma)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        return Noised(
            noisy, timesteps, row.target(self.scheduler, latents, noise, timesteps), weights
        )

    def signal_to_noise(self, timesteps: Tensor) -> Tensor:
        """Returns the ratio of powers, alpha / (1 - alpha), at timesteps (batch,)."""
        alphas: Tensor = self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
        return alphas / (1 - alphas)


class FlowNoise:
    """Noises latents along straight lines, for denoisers that predict noise - latents.

    Args:
        config: Of the pipeline's scheduler; its `shift` counts, or `flow_shift` as others spell it.
        sampling: A row of `SAMPLINGS`: where on the line.
        weighting: A row of `WEIGHTINGS`.

    Raises:
        InvalidOption: A value cannot work.
    """

    prediction = FLOW

    def __init__(
        self, config: Mapping[str, Any], *, sampling: str = "uniform", weighting: str = "none"
    ) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        self._sample = SAMPLINGS[chosen("sampling", sampling, SAMPLINGS)]
        self._weigh = WEIGHTINGS[chosen("weighting", weighting, WEIGHTINGS)]
        # anew: a pipeline that has run holds the few sigmas of its last call
        made: Any = FlowMatchEulerDiscreteScheduler
        shift = config.get("flow_shift", config.get("shift", 1.0))
        self.scheduler = made.from_config(config, shift=shift)

    def __call__(self, latents: Tensor, generator: Generator | None = None) -> Noised:
        """Noises latents, see `DiffusionNoise`."""
        noise = noise_like(latents, generator)
        count = len(self.scheduler.timesteps)
        # the last place itself may be drawn, after rounding
        indices = (self._sample(len(latents), generator) * count).long().clamp(0, count - 1)
        return self.at(latents, noise, indices)

    def at(self, latents: Tensor, noise: Tensor, indices: Tensor) -> Noised:
        """Returns what latents and noise are at places of the scheduler's timesteps (batch,)."""
        indices = indices.cpu()
        steps = self.scheduler.timesteps[indices].to(latents.device)
        sigma = self.scheduler.sigmas[indices].to(latents.device, latents.dtype)
        part = sigma.view(-1, 1, 1, 1)
        weights = None if self._weigh is None else self._weigh(sigma).float()
        noisy = (1.0 - part) * latents + part * noise
        return Noised(noisy, steps, noise - latents, weights)


def noise_like(tensor: Tensor, generator: Generator | None) -> Tensor:
    """Returns normal noise shaped as a tensor, where it lies; a generator is one of the CPU."""
    if generator is None:
        return torch.randn_like(tensor)
    return torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)


def noised_each(
    noise_of: DiffusionNoise | FlowNoise, latents: Tensor, generators: Sequence[Generator]
) -> Noised:
    """Noises latents (batch, ...), each with a generator of its own."""
    each = [noise_of(one[None], own) for one, own in zip(latents, generators, strict=True)]
    weights = [one.weights for one in each if one.weights is not None]
    return Noised(
        torch.cat([one.noisy for one in each]),
        torch.cat([one.timesteps for one in each]),
        torch.cat([one.target for one in each]),
        torch.cat(weights) if weights else None,
    )


def is_flow(scheduler: Any) -> bool:
    """Tells whether a scheduler samples along the lines of flow matching."""
    named = type(scheduler).__name__.startswith("FlowMatch")
    return named or bool(scheduler.config.get("use_flow_sigmas"))


def noiser_for(
    scheduler: Any,
    *,
    flow_only: bool = False,
    prediction: str | None,
    min_snr_gamma: float | None,
    noise_offset: float,
    sampling: str | None,
    default_sampling: str = "uniform",
    weighting: str,
) -> DiffusionNoise | FlowNoise:
    """Returns what noises latents for a pipeline's scheduler.

    Args:
        scheduler: The pipeline's.
        flow_only: Whether its denoiser knows flow matching alone.
        prediction: See `DiffusionTrainingModule`, as the others.
        min_snr_gamma: Likewise.
        noise_offset: Likewise.
        sampling: Likewise.
        default_sampling: Of flow matching, where `sampling` is None.
        weighting: Likewise.

    Raises:
        InvalidOption: An option has a value that cannot work with this scheduler.
        UnsupportedHost: The pipeline has no scheduler, or none whose noise is known.
    """
    if scheduler is None:
        raise UnsupportedHost("the pipeline has no scheduler", fix="Load it with from_pretrained.")
    name = type(scheduler).__name__
    flow = is_flow(scheduler)
    if not flow:
        _check_diffuses(scheduler, flow_only=flow_only)
    if prediction is not None and (prediction == FLOW) != flow:
        chosen("prediction", prediction, {**PREDICTIONS, FLOW: None})
        raise InvalidOption(
            f"prediction={prediction!r} with a {name}",
            fix="Leave it out: the scheduler says what the denoiser predicts.",
            field="prediction",
        )
    if not flow:
        drawn = sampling not in (None, "uniform")
        _unasked(name, {"sampling": drawn, "weighting": weighting != "none"})
        return DiffusionNoise(
            scheduler.config,
            prediction=prediction,
            min_snr_gamma=min_snr_gamma,
            noise_offset=noise_offset,
        )
    _unasked(name, {"min_snr_gamma": min_snr_gamma is not None, "noise_offset": bool(noise_offset)})
    sampling = default_sampling if sampling is None else sampling
    return FlowNoise(scheduler.config, sampling=sampling, weighting=weighting)


def _check_diffuses(scheduler: Any, *, flow_only: bool) -> None:
    """Raises UnsupportedHost where a scheduler without flow is not one of betas, or may not be."""
    name = type(scheduler).__name__
    if flow_only:
        raise UnsupportedHost(
            f"the denoiser knows flow matching, and {name} samples otherwise",
            fix="Give the pipeline the scheduler of its base, a FlowMatchEulerDiscreteScheduler.",
        )
    # the noise of EDM (arXiv 2206.00364) is no sum of betas: latents are scaled, and losses weighed
    if name.startswith("EDM") or not {"beta_start", "trained_betas"} & set(scheduler.config):
        raise UnsupportedHost(
            f"no training with the noise of {name} is known",
            fix="Known are schedulers with betas (DDPM, DDIM, Euler ...) and flow matching.",
        )


def _unasked(scheduler: str, asked: Mapping[str, bool]) -> None:
    """Raises InvalidOption for an option that would do nothing with this kind of noise."""
    for field in (name for name, given in asked.items() if given):
        raise InvalidOption(
            f"{field}= does nothing with a {scheduler}", fix="Leave it out.", field=field
        )


def loss_of(prediction: Tensor, noised: Noised) -> Tensor:
    """Returns the mean squared error in float32 (), each picture by its weight."""
    made, wanted = prediction.float(), noised.target.float()
    if noised.weights is None:
        return functional.mse_loss(made, wanted)
    each = functional.mse_loss(made, wanted, reduction="none").flatten(1).mean(1)
    return (each * noised.weights).mean()
