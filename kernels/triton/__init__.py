"""The operators as Triton kernels behind torch custom operators; same names and signatures as in the reference folder.

Needs the library triton, so Linux. Importing touches no device.
"""
