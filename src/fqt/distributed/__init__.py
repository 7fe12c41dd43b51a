"""Between processes: gradients averaged in quantized messages."""

from fqt.distributed.hook import Messages as Messages
from fqt.distributed.hook import quantized_messages as quantized_messages
