__version__ = "0.1.0"
import warnings
# fastai decorates with torch.jit.script, which torch deprecates: nothing a user of this package can act on
warnings.filterwarnings('ignore', message='.*torch.jit.script.*', category=FutureWarning)
