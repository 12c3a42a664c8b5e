"""One thread for all tests: tiny tensors gain nothing from two, and lose a factor of ten on busy machines."""
import torch

torch.set_num_threads(1)
