"""The losses of the method: tensors in, `Loss(value, metrics)` out.

Nothing here knows a model, a device, a config or a service. Everything is float32 or better inside.

    advantage         rewards of groups -> advantages
    subgrpo           policy loss of a selected step
    ac_dmd            fake-score loss, distribution matching loss
    consistency       two-sample regulariser of the fake score
    reward_gradient   hinge on differentiable rewards, and the way back from a remote reward's gradient
"""
