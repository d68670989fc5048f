"""Sigmoid losses: each pair of an image and a text is a question of its own, with a label between 0 and 1.

    loss = 1/N Σ_ij [softplus(z_ij) − q_ij z_ij],  z_ij = s x_i·y_j + b

This is SigLIP's (Zhai et al. 2023, arXiv 2303.15343) for labels of 0 and 1: softplus(z) − q z = −q log σ(z) − (1−q) log σ(−z).
It is linear in the labels, so soft ones cost what they cost the softmax loss. Letters as in `blockwise`.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.losses.blocks import Products, dot, logit_blocks, true_in
from pretrain.losses.blockwise import SoftPart, apply_targets, to_gradients
from pretrain.losses.exchange import Layout, gather_rows
from pretrain.losses.operators import Targets


def sigmoid_loss(
    images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, targets: Targets, layout: Layout
) -> Tensor:
    """Returns this rank's share of the loss; the mean over ranks is the loss over all N pairs.

    `images`, `texts`: (B, D) in float32, float64 or bfloat16. `scale`, `bias`: s and b, one number each. As
    `blockwise_loss` in all else.
    """
    return cast(Tensor, _Loss.apply(images, texts, scale, bias, targets, layout))


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, targets: Targets, layout: Layout
    ) -> Tensor:
        dtype = torch.promote_types(images.dtype, torch.float32)
        factor, offset = (x.detach().reshape(()).to(dtype) for x in (scale, bias))
        targets = targets.to(dtype)
        all_images, all_texts = gather_rows(images, layout), gather_rows(texts, layout)
        soft = apply_targets(targets, all_images, all_texts, layout, dtype, any(ctx.needs_input_grad))

        mine = layout.mine
        true = torch.empty(len(images), dtype=torch.float64, device=images.device)
        loss = torch.zeros((), dtype=torch.float64, device=images.device)
        for rows, columns, block in logit_blocks(images.detach(), all_texts, factor):
            if targets.tiles is not None:
                loss -= dot(targets.tiles.block(rows, columns), block)
            on_diagonal, places = true_in(block, rows, columns, mine.start)
            true[places] = on_diagonal.double()
            on_diagonal.fill_(-torch.inf)
            loss += _softplus(block.add_(offset)).sum().double()
        # True pairs apart: softplus(z) − z = softplus(−z) keeps its digits where the model is nearly sure. Of −q z, with
        # z = s x·y + b, the first term is W's and the second only needs the sum of labels.
        diagonal, labels = targets.diagonal[mine], targets.label_sums[mine].sum()
        excess = -(true + offset.double())
        loss = loss + _softplus(excess).sum() + ((1 - diagonal) * true).sum()
        loss = loss + offset.double() * (len(images) - labels) - factor.double() * soft.dot(images)
        of_bias = len(images) - labels - torch.sigmoid(excess).sum()  # less what other pairs add
        diagonal = (1 - diagonal - torch.sigmoid(excess)).to(dtype)  # of σ(z) − W
        partners = all_images if images.dtype == torch.bfloat16 else None
        ctx.save_for_backward(
            images, all_texts, factor, offset, diagonal, of_bias, partners, soft.of_images, soft.of_texts
        )
        ctx.layout, ctx.tiles = layout, targets.tiles
        ctx.scalars = [(x.dtype, x.shape) for x in (scale, bias)]
        return (len(layout.counts) / layout.total * loss).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        images, all_texts, factor, offset, diagonal, of_bias, partners, *soft = ctx.saved_tensors
        layout: Layout = ctx.layout
        products = Products(images, all_texts, factor, layout.mine.start, partners)
        of_bias = of_bias.clone()
        for rows, columns, block in logit_blocks(images, all_texts, factor):
            logits = block.clone() if products.keeps_logits else None
            block.add_(offset).sigmoid_()
            on_diagonal, places = true_in(block, rows, columns, layout.mine.start)
            on_diagonal.zero_()
            of_bias += block.sum().double()
            if ctx.tiles is not None:
                block.sub_(ctx.tiles.block(rows, columns))
            on_diagonal.copy_(diagonal[places])
            products.add(rows, columns, block, logits)
        d_images, d_texts, d_scale = to_gradients(
            *products.finish(), images, factor, gradients[0], SoftPart(*soft), layout
        )
        d_bias = of_bias * gradients[0].double() * len(layout.counts) / layout.total
        scalars = (
            value.to(dtype).reshape(shape) for value, (dtype, shape) in zip((d_scale, d_bias), ctx.scalars, strict=True)
        )
        return d_images, d_texts, *scalars, None, None


def _softplus(logits: Tensor) -> Tensor:
    """Returns log(1 + exp(z)); torch's own is off by 2e-9 above its default threshold."""
    return torch.nn.functional.softplus(logits, threshold=50)
