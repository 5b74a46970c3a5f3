"""What a user touches: init, wrap, log, launch, Trainer, fit."""
