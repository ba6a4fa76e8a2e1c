"""A plan: the memory and the operations of a run, before it starts, from configs alone.

`plan.plan` lets the trainer run its own iterations on networks without values (`measure`), whose teacher is built from configs
(`weightless`) and whose data are placeholders (`placeholders`). `meter` counts, `fake_tensors` closes the gaps of torch's fake
tensors, `eight_bit` has the optimizer states of bitsandbytes, `figures` the counts. Only the command line imports it.
"""
