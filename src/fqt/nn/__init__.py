"""Layers on quantized operands: recipes, conversion, explanation."""

from fqt.nn.between import compress_ as compress_
from fqt.nn.call import GradientOperand as GradientOperand
from fqt.nn.convert import quantize_ as quantize_
from fqt.nn.convert import restore_ as restore_
from fqt.nn.explain import explain as explain
from fqt.nn.forms import register as register
from fqt.nn.layers import convolution as convolution
from fqt.nn.layers import linear as linear
from fqt.nn.masks import inductor_options as inductor_options
from fqt.nn.observe import observe as observe
from fqt.nn.product import Product as Product
from fqt.nn.ranges import remembered as remembered
from fqt.nn.recipe import Recipe as Recipe
from fqt.nn.recipe import Rule as Rule
from fqt.nn.recipe import dump_recipe as dump_recipe
from fqt.nn.recipe import load_recipe as load_recipe
from fqt.nn.redirect import own_forward as own_forward
from fqt.nn.stored import recipe_of as recipe_of
