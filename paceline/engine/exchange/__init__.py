"""What happens inside ``optimizer.step()``: gradients, meetings, steps of the shared parameters."""
