"""The losses of the method: tensors in, `Loss(value, metrics)` out.

Nothing here knows a model, device, config or service. All computation is in float32 or better.

    advantage         rewards of groups -> advantages
    subgrpo           policy loss of a selected step
    ac_dmd            fake-score loss, distribution matching loss
    consistency       two-sample regulariser of the fake score
    reward_gradient   hinge on differentiable rewards, and the backward pass from a remote reward's gradient
"""
