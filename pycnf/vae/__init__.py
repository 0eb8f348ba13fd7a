"""Variational auto-encoders whose posterior is a flow: the workload of FFJORD and of the TPR paper beside densities."""

from pycnf.vae.amortized import LowRankMLP as LowRankMLP
from pycnf.vae.bounds import Bound as Bound
from pycnf.vae.bounds import Likelihood as Likelihood
from pycnf.vae.bounds import evaluate_vae as evaluate_vae
from pycnf.vae.bounds import evidence_bound as evidence_bound
from pycnf.vae.bounds import importance_likelihood as importance_likelihood
from pycnf.vae.model import VAE as VAE
from pycnf.vae.pictures import PictureSet as PictureSet
from pycnf.vae.pictures import describe_pictures as describe_pictures
from pycnf.vae.pictures import load_pictures as load_pictures
from pycnf.vae.posteriors import SolvePlan as SolvePlan
from pycnf.vae.training import load_vae as load_vae
from pycnf.vae.training import save_vae as save_vae
from pycnf.vae.training import train_vae as train_vae
