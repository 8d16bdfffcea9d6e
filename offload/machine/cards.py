"""Graphics cards and their published figures: memory, bandwidth, PCIe port, compute capability.

The figures were compared with the GPU databases of TechPowerUp (of December 2025) and Wikipedia.
Where these differ from the maker's data sheet, the data sheet's figure stands: RTX 2000 Ada,
RTX 5880 Ada, H100, H200, Arc A770. Apple's and AMD's chips with shared memory have their makers'
figures. NVIDIA does not publish the lanes of laptops' cards, and other sources contradict each
other: those of the RTX 3050 Ti, 5050, 5060 and 5070 Laptop are guessed from the desktop cards with
the same chip. Of a card that is sold with several sizes of memory, the first row has the usual one.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A graphics card as it is published."""

    name: str
    gib: int  # of memory
    gb_per_s: float  # bandwidth of the memory
    pcie: int = 0  # generation
    lanes: int = 0
    compute: float = 0.0  # CUDA's compute capability; 0 for cards that have no CUDA


# name, GiB, GB/s, PCIe generation and lanes, compute capability
_NVIDIA = """
RTX 2060,                       6,  336.0, 3x16,  7.5
RTX 2060 12GB,                 12,  336.0, 3x16,  7.5
RTX 2060 Super,                 8,  448.0, 3x16,  7.5
RTX 2070,                       8,  448.0, 3x16,  7.5
RTX 2070 Super,                 8,  448.0, 3x16,  7.5
RTX 2080,                       8,  448.0, 3x16,  7.5
RTX 2080 Super,                 8,  496.0, 3x16,  7.5
RTX 2080 Ti,                   11,  616.0, 3x16,  7.5
Titan RTX,                     24,  672.0, 3x16,  7.5
RTX 2060 Laptop,                6,  336.0, 3x16,  7.5
RTX 2070 Laptop,                8,  448.0, 3x16,  7.5
RTX 2070 Super Laptop,          8,  448.0, 3x16,  7.5
RTX 2080 Laptop,                8,  448.0, 3x16,  7.5
RTX 2080 Super Laptop,          8,  448.0, 3x16,  7.5
RTX 3050,                       8,  224.0, 4x8,   8.6
RTX 3050 6GB,                   6,  168.0, 4x8,   8.6
RTX 3060,                      12,  360.0, 4x16,  8.6
RTX 3060 8GB,                   8,  240.0, 4x16,  8.6
RTX 3060 Ti,                    8,  448.0, 4x16,  8.6
RTX 3070,                       8,  448.0, 4x16,  8.6
RTX 3070 Ti,                    8,  608.0, 4x16,  8.6
RTX 3080,                      10,  760.0, 4x16,  8.6
RTX 3080 12GB,                 12,  912.0, 4x16,  8.6
RTX 3080 Ti,                   12,  912.0, 4x16,  8.6
RTX 3090,                      24,  936.0, 4x16,  8.6
RTX 3090 Ti,                   24, 1008.0, 4x16,  8.6
RTX 3050 Laptop,                4,  192.0, 4x8,   8.6
RTX 3050 Ti Laptop,             4,  192.0, 4x8,   8.6
RTX 3060 Laptop,                6,  336.0, 4x16,  8.6
RTX 3070 Laptop,                8,  448.0, 4x16,  8.6
RTX 3070 Ti Laptop,             8,  448.0, 4x16,  8.6
RTX 3080 Laptop,               16,  448.0, 4x16,  8.6
RTX 3080 Laptop 8GB,            8,  448.0, 4x16,  8.6
RTX 3080 Ti Laptop,            16,  512.0, 4x16,  8.6
RTX 4060,                       8,  272.0, 4x8,   8.9
RTX 4060 Ti,                    8,  288.0, 4x8,   8.9
RTX 4060 Ti 16GB,              16,  288.0, 4x8,   8.9
RTX 4070,                      12,  504.0, 4x16,  8.9
RTX 4070 Super,                12,  504.0, 4x16,  8.9
RTX 4070 Ti,                   12,  504.0, 4x16,  8.9
RTX 4070 Ti Super,             16,  672.0, 4x16,  8.9
RTX 4080,                      16,  716.8, 4x16,  8.9
RTX 4080 Super,                16,  736.0, 4x16,  8.9
RTX 4090,                      24, 1008.0, 4x16,  8.9
RTX 4090 D,                    24, 1008.0, 4x16,  8.9
RTX 4050 Laptop,                6,  192.0, 4x8,   8.9
RTX 4060 Laptop,                8,  256.0, 4x8,   8.9
RTX 4070 Laptop,                8,  256.0, 4x8,   8.9
RTX 4080 Laptop,               12,  432.0, 4x16,  8.9
RTX 4090 Laptop,               16,  576.0, 4x16,  8.9
RTX 5050,                       8,  320.0, 5x8,  12.0
RTX 5060,                       8,  448.0, 5x8,  12.0
RTX 5060 Ti,                   16,  448.0, 5x8,  12.0
RTX 5060 Ti 8GB,                8,  448.0, 5x8,  12.0
RTX 5070,                      12,  672.0, 5x16, 12.0
RTX 5070 Ti,                   16,  896.0, 5x16, 12.0
RTX 5080,                      16,  960.0, 5x16, 12.0
RTX 5090,                      32, 1792.0, 5x16, 12.0
RTX 5090 D,                    32, 1792.0, 5x16, 12.0
RTX 5050 Laptop,                8,  384.0, 5x8,  12.0
RTX 5060 Laptop,                8,  384.0, 5x8,  12.0
RTX 5070 Laptop,                8,  384.0, 5x8,  12.0
RTX 5070 Ti Laptop,            12,  672.0, 5x16, 12.0
RTX 5080 Laptop,               16,  896.0, 5x16, 12.0
RTX 5090 Laptop,               24,  896.0, 5x16, 12.0
Quadro RTX 4000,                8,  416.0, 3x16,  7.5
Quadro RTX 5000,               16,  448.0, 3x16,  7.5
Quadro RTX 6000,               24,  672.0, 3x16,  7.5
Quadro RTX 8000,               48,  672.0, 3x16,  7.5
RTX A1000,                      8,  192.0, 4x8,   8.6
RTX A2000,                      6,  288.0, 4x16,  8.6
RTX A2000 12GB,                12,  288.0, 4x16,  8.6
RTX A4000,                     16,  448.0, 4x16,  8.6
RTX A4500,                     20,  640.0, 4x16,  8.6
RTX A5000,                     24,  768.0, 4x16,  8.6
RTX A5500,                     24,  768.0, 4x16,  8.6
RTX A6000,                     48,  768.0, 4x16,  8.6
RTX 2000 Ada,                  16,  224.0, 4x8,   8.9
RTX 4000 SFF Ada,              20,  280.0, 4x16,  8.9
RTX 4000 Ada,                  20,  360.0, 4x16,  8.9
RTX 4500 Ada,                  24,  432.0, 4x16,  8.9
RTX 5000 Ada,                  32,  576.0, 4x16,  8.9
RTX 5880 Ada,                  48,  960.0, 4x16,  8.9
RTX 6000 Ada,                  48,  960.0, 4x16,  8.9
RTX PRO 2000 Blackwell,        16,  288.0, 5x8,  12.0
RTX PRO 4000 Blackwell,        24,  672.0, 5x16, 12.0
RTX PRO 4500 Blackwell,        32,  896.0, 5x16, 12.0
RTX PRO 5000 Blackwell,        48, 1344.0, 5x16, 12.0
RTX PRO 5000 Blackwell 72GB,   72, 1344.0, 5x16, 12.0
RTX PRO 6000 Blackwell,        96, 1792.0, 5x16, 12.0
T4,                            16,  320.0, 3x16,  7.5
A10,                           24,  600.0, 4x16,  8.6
A30,                           24,  933.0, 4x16,  8.0
A40,                           48,  696.0, 4x16,  8.6
A100,                          80, 2039.0, 4x16,  8.0
A100 40GB,                     40, 1555.0, 4x16,  8.0
L4,                            24,  300.0, 4x16,  8.9
L40,                           48,  864.0, 4x16,  8.9
L40S,                          48,  864.0, 4x16,  8.9
H100,                          80, 3350.0, 5x16,  9.0
H100 PCIe,                     80, 2000.0, 5x16,  9.0
H200,                         141, 4800.0, 5x16,  9.0
"""

# Cards that models cannot be run on, because they have no CUDA or because torch has given them up.
_OTHERS = """
GTX 1060,                       6,  192.0
GTX 1070,                       8,  256.0
GTX 1080,                       8,  320.0
GTX 1080 Ti,                   11,  484.0
Titan V,                       12,  653.0
V100,                          16,  900.0
RX 6600,                        8,  224.0
RX 6700 XT,                    12,  384.0
RX 6800,                       16,  512.0
RX 6800 XT,                    16,  512.0
RX 6900 XT,                    16,  512.0
RX 6950 XT,                    16,  576.0
RX 7600,                        8,  288.0
RX 7600 XT,                    16,  288.0
RX 7700 XT,                    12,  432.0
RX 7800 XT,                    16,  624.0
RX 7900 GRE,                   16,  576.0
RX 7900 XT,                    20,  800.0
RX 7900 XTX,                   24,  960.0
RX 9060 XT,                    16,  320.0
RX 9070,                       16,  640.0
RX 9070 XT,                    16,  640.0
Arc A770,                      16,  560.0
Arc B580,                      12,  456.0
Apple M1 Max,                  64,  400.0
Apple M2 Max,                  96,  400.0
Apple M2 Ultra,               192,  800.0
Apple M3 Max,                 128,  400.0
Apple M3 Ultra,               512,  819.0
Apple M4 Pro,                  64,  273.0
Apple M4 Max,                 128,  546.0
Ryzen AI Max,                 128,  256.0
"""


def _card(line: str) -> Card:
    name, gib, rate, *rest = (part.strip() for part in line.split(","))
    if not rest:
        return Card(name, int(gib), float(rate))
    pcie, lanes = rest[0].split("x")
    return Card(name, int(gib), float(rate), int(pcie), int(lanes), float(rest[1]))


CARDS = tuple(map(_card, _NVIDIA.strip().splitlines()))
OTHERS = tuple(map(_card, _OTHERS.strip().splitlines()))
