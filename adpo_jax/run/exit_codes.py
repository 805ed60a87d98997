"""The exit codes of `python -m adpo_jax.main`; 0 means done, 1 a fault of this program."""

USER_ERROR = 2  # a mistake in the command line, config, data, model, run folder or reward function
STOPPED = 3  # the training was stopped by its settings: updates that are not sound
DISK_ERROR = 4  # no checkpoint could be written, or one could not be read for now
HOST_LOST = 5  # one of several died; 134, JAX's own, if JAX notices while nothing is exchanged
DOES_NOT_FIT = 6  # a dry run found that the devices are too small
INTERRUPTED = 75  # by a signal or a preemption notice; the same command goes on (EX_TEMPFAIL)
SECOND_INTERRUPT = 130  # a second Ctrl-C, or one before the run heeds signals
