"""Images: the multiscale flow, its pieces, and the sets of images."""

from pycnf.images.dequantization import VariationalNoise as VariationalNoise
from pycnf.images.flow import ImageDistribution as ImageDistribution
from pycnf.images.flow import ImageFlow as ImageFlow
from pycnf.images.flow import ImageSolution as ImageSolution
from pycnf.images.flow import interpolate as interpolate
from pycnf.images.pieces import Logit as Logit
from pycnf.images.pieces import bits_per_dim as bits_per_dim
from pycnf.images.pieces import dequantize as dequantize
from pycnf.images.pieces import squeeze as squeeze
from pycnf.images.pieces import unsqueeze as unsqueeze
from pycnf.images.sets import SOURCES as SOURCES
from pycnf.images.sets import ImageSet as ImageSet
from pycnf.images.sets import describe as describe
from pycnf.images.sets import fetch as fetch
from pycnf.images.sets import load as load
