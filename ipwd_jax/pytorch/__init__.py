"""PyTorch checkpoints, read and written without PyTorch.

A checkpoint that `torch.save` wrote, in either of its formats, or a safetensors file becomes the
work directory of a finished run, which serves as a teacher like one that was trained here. The
network of any run becomes a state dict that PyTorch loads strictly. `python -m ipwd_jax.convert`
is the command for both.

The parts, each of which uses only those above it:

- `records`: the inert records and the few functions that the names in a pickle stand for.
- `pickles`: carries out the instructions of a pickle one by one. Nothing that a file names is ever
  imported or called, and a small file cannot use much memory.
- `files`: the file formats around the pickle or the tensors, for reading and for writing.
- `names`: the names and layouts of tensors, from PyTorch's to Flax's and back, bit for bit. Modules
  carry the names of the reference implementations, so one rule serves every network.
- `networks`: infers which network a file belongs to from the names and shapes of its tensors.
- `state_dicts`: finds the network's tensors among everything else that training scripts save.
- `convert`: `import_file` and `export_file`, the two functions that a program needs.

In float64, networks return the same outputs as in PyTorch; docs/networks.md says of which of them
the outputs and the gradients were compared. A state dict that is imported and exported again is
bitwise the same.
"""

from ipwd_jax.pytorch.convert import export_file, import_file

__all__ = ["export_file", "import_file"]
