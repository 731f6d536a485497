"""Walking from one noise level to another with the model's own velocity, every image on a path of its own.

First order is Euler's step along a straight line. ``dpm`` of order 2 is DPM-Solver++(2M) (arXiv:2211.01095); ``unipc`` has the same
predictor and corrects each point but the last with the prediction made there (arXiv:2302.04867, B2). On the straight path
alpha = 1 - sigma, and both are combinations of the pictures x - sigma v that were predicted on the way.

Shapes: B images, C latent channels, H x W latent pixels, L text tokens, D joint text width, P pooled text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from sd3tune.training import flow

Sampler = Literal["unipc", "euler", "dpm"]

NEAR_NOISE = 1e-6
"""Least share of the picture at pure noise, so that its logarithm is finite; as in diffusers."""


@torch.no_grad()
def walk(
    velocity: flow.Velocity, start_BCHW: Tensor, joint_BLD: Tensor, pooled_BP: Tensor, *, paths: Sequence[Sequence[float]],
    sampler: Sampler, order: int,
) -> Tensor:  # fmt: skip
    """The latents at the ends of their paths, which are falling noise levels, one path for each image; their lengths may differ.

    Step j of all images that have one is one call of the model.
    """
    longest_first = sorted(range(len(paths)), key=lambda i: -len(paths[i]))
    here_BCHW, joint_BLD, pooled_BP = start_BCHW[longest_first], joint_BLD[longest_first], pooled_BP[longest_first]
    rows = [paths[i] for i in longest_first]
    done: list[Tensor] = []
    pictures: list[Tensor] = []  # predicted so far, newest last; of the images that still walk
    before_BCHW = here_BCHW
    for step in range(len(rows[0]) - 1):
        count = sum(len(row) - 1 > step for row in rows)
        done.append(here_BCHW[count:])
        here_BCHW, before_BCHW = here_BCHW[:count], before_BCHW[:count]
        pictures = [picture_BCHW[:count] for picture_BCHW in pictures[-2:]]
        levels_SB = [torch.tensor([row[at] for row in rows[:count]], dtype=torch.float64) for at in range(step + 2)]
        sigma_B = levels_SB[step].to(here_BCHW)
        velocity_BCHW = velocity(here_BCHW, sigma_B, joint_BLD[:count], pooled_BP[:count]).float()
        pictures.append(here_BCHW - sigma_B.view(-1, 1, 1, 1) * velocity_BCHW)
        if sampler == "unipc" and step:
            here_BCHW = corrected(before_BCHW, pictures, levels_SB[:-1], second=order == 2 and step > 1)
        before_BCHW = here_BCHW
        here_BCHW = predicted(here_BCHW, pictures, levels_SB, second=sampler != "euler" and order == 2 and step > 0)
    done.append(here_BCHW)
    walked_BCHW = torch.empty_like(start_BCHW)
    walked_BCHW[longest_first] = torch.cat(done[::-1])
    return walked_BCHW


def predicted(here_BCHW: Tensor, pictures: Sequence[Tensor], levels_SB: Sequence[Tensor], *, second: bool) -> Tensor:
    """One step from the last level but one to the last; ``second`` goes on as the last two predicted pictures do."""
    now_B, then_B = levels_SB[-2:]
    aim_BCHW = pictures[-1]
    if second:
        slope_B = 0.5 * _stride(now_B, then_B) / _stride(levels_SB[-3], now_B)
        aim_BCHW = aim_BCHW + _wide(slope_B, here_BCHW) * (pictures[-1] - pictures[-2])
    return _towards(here_BCHW, aim_BCHW, now_B, then_B)


def corrected(before_BCHW: Tensor, pictures: Sequence[Tensor], levels_SB: Sequence[Tensor], *, second: bool) -> Tensor:
    """The step to the last level once more, now that the picture is predicted there, too."""
    start_B, now_B = levels_SB[-2:]
    stride_B = _stride(start_B, now_B)
    old_BCHW, new_BCHW = pictures[-2:]
    if not second:
        return _towards(before_BCHW, (old_BCHW + new_BCHW) / 2, start_B, now_B)
    decay_B = torch.expm1(-stride_B)
    first_B = (-decay_B / stride_B - 1) / decay_B
    last_B = 2 * ((decay_B / stride_B + 1) / stride_B - 0.5) / decay_B
    ratio_B = -_stride(levels_SB[-3], start_B) / stride_B
    past_B = (first_B - last_B) / (1 - ratio_B)
    aim_BCHW = old_BCHW + _wide(first_B - past_B, old_BCHW) * (new_BCHW - old_BCHW)
    aim_BCHW = aim_BCHW + _wide(past_B / ratio_B, old_BCHW) * (pictures[-3] - old_BCHW)
    return _towards(before_BCHW, aim_BCHW, start_B, now_B)


def _towards(here_BCHW: Tensor, aim_BCHW: Tensor, now_B: Tensor, then_B: Tensor) -> Tensor:
    """The point at level ``then`` on the straight line through here, at level ``now``, that ends in the picture ``aim``."""
    share_B = then_B / now_B
    return _wide(share_B, here_BCHW) * here_BCHW + _wide(1 - share_B, here_BCHW) * aim_BCHW


def _stride(now_B: Tensor, then_B: Tensor) -> Tensor:
    """How far log(alpha / sigma) grows from one level to a lower one."""
    return _log_ratio(then_B) - _log_ratio(now_B)


def _log_ratio(sigma_B: Tensor) -> Tensor:
    return torch.log((1 - sigma_B).clamp(min=NEAR_NOISE)) - torch.log(sigma_B)


def _wide(number_B: Tensor, like: Tensor) -> Tensor:
    return number_B.to(like).view(-1, 1, 1, 1)
