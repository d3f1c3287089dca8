"""What a fit reached, in figures and in words, computed from the fit's own rows."""

from nullbayes.certificate.certificate import Certificate as Certificate
