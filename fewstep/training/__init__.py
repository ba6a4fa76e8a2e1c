"""Training: a run from its settings to scores.

    run             check -> build -> train -> export -> score, each a function; `run(config) -> Run`, `export_run(folder)`
    preflight       checks of a run that would otherwise fail only at its end
    trainer         the loop: batches, updates, log, validation, checkpoints
    roles           RoleState: a role's network, its own tensors, optimizer and number of updates
    updates         one optimizer update of one role
    batches         conditions and latents for the losses
    optim           optimizers, the learning-rate schedule
    log             means over a window of iterations, log.jsonl, tracker
    validation      scores and sample grids during training; early_stopping ends a run by them
    checkpoint      all that exact resume needs
    termination     SIGTERM ends a run after the current iteration, with a checkpoint
    callbacks       functions of the caller's at log lines, checkpoints and the end
    accelerator, offloading, init_from, final_scores

A loss of `methods` does not know any of this. The command line, `fewstep.api`, `plan` and `pretrain` may import it.
"""
