//! Finds out what a type reads, by letting it read: a deserializer that leads to one place of a
//! document and notes what the type asks for there.

use std::cell::Cell;

use serde::Deserialize;
use serde::de::{
    DeserializeSeed, Deserializer, EnumAccess, Error as _, IntoDeserializer, MapAccess, SeqAccess,
    VariantAccess, Visitor,
};

/// A step on the way to a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    Key(&'static str),
    Element,
    Variant(&'static str),
}

/// What a type reads at a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It looks at what is there, and then decides.
    Anything,
    Boolean,
    Integer {
        least: Option<u64>,
    },
    Number,
    Text,
    List,
    Map,
    Struct {
        name: &'static str,
        fields: &'static [&'static str],
    },
    Enum(&'static [&'static str]),
}

/// What was found out at the place.
#[derive(Debug, Default)]
struct Found {
    kind: Cell<Option<Kind>>,
    word: Cell<bool>,
}

/// What a `T` reads at the end of `path`.
pub fn kind<'de, T: Deserialize<'de>>(path: &[Step]) -> Kind {
    lead::<T>(path).kind.get().unwrap_or(Kind::Anything)
}

/// Whether the variant at the end of `path` has no value.
pub fn is_word<'de, T: Deserialize<'de>>(path: &[Step]) -> bool {
    lead::<T>(path).word.get()
}

/// The value that was asked for is never made, so what comes of it is an error of no interest.
fn lead<'de, T: Deserialize<'de>>(path: &[Step]) -> Found {
    let found = Found::default();
    drop(T::deserialize(Trace { path, given: &[], found: &found }));
    found
}

/// The keys without which the structure at the end of `path` is refused.
pub fn required<'de, T: Deserialize<'de>>(path: &[Step]) -> Vec<&'static str> {
    let Kind::Struct { fields, .. } = kind::<T>(path) else { return Vec::new() };
    let mut given = Vec::new();
    loop {
        let found = Found::default();
        let refused = T::deserialize(Trace { path, given: &given, found: &found }).err();
        let text = refused.map(|error| error.to_string()).unwrap_or_default();
        let missing = text.strip_prefix("missing field `").and_then(|it| it.strip_suffix('`'));
        match fields.iter().find(|field| missing == Some(**field)) {
            Some(field) if !given.contains(field) => given.push(*field),
            _ => return given,
        }
    }
}

#[derive(Clone, Copy)]
struct Trace<'a> {
    path: &'a [Step],
    /// Keys that the structure at the end of the path is given, each with a number or a structure.
    given: &'a [&'static str],
    found: &'a Found,
}

type Error = serde::de::value::Error;

impl<'a> Trace<'a> {
    /// The next step, and the way that is left after it.
    fn next(self) -> Option<(Step, Self)> {
        let (step, path) = self.path.split_first()?;
        Some((*step, Self { path, ..self }))
    }

    /// Notes a kind at the end of the path.
    fn is<T>(self, kind: Kind) -> Result<T, Error> {
        if self.path.is_empty() {
            self.found.kind.set(Some(kind));
        }
        Err(Error::custom("seen"))
    }
}

/// Kinds that end a path.
macro_rules! ends {
    ($($method:ident => $kind:expr),* $(,)?) => {
        $(fn $method<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Error> {
            self.is($kind)
        })*
    };
}

impl<'de> Deserializer<'de> for Trace<'_> {
    type Error = Error;

    ends! {
        deserialize_any => Kind::Anything,
        deserialize_ignored_any => Kind::Anything,
        deserialize_bool => Kind::Boolean,
        deserialize_i8 => Kind::Integer { least: None },
        deserialize_i16 => Kind::Integer { least: None },
        deserialize_i32 => Kind::Integer { least: None },
        deserialize_i64 => Kind::Integer { least: None },
        deserialize_u8 => Kind::Integer { least: Some(0) },
        deserialize_u16 => Kind::Integer { least: Some(0) },
        deserialize_u32 => Kind::Integer { least: Some(0) },
        deserialize_u64 => Kind::Integer { least: Some(0) },
        deserialize_f32 => Kind::Number,
        deserialize_f64 => Kind::Number,
        deserialize_char => Kind::Text,
        deserialize_str => Kind::Text,
        deserialize_string => Kind::Text,
        deserialize_identifier => Kind::Text,
        deserialize_bytes => Kind::Anything,
        deserialize_byte_buf => Kind::Anything,
        deserialize_unit => Kind::Anything,
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: V,
    ) -> Result<V::Value, Error> {
        self.is(Kind::Anything)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.next() {
            Some((Step::Element, inside)) => visitor.visit_seq(Elements(inside)),
            _ => self.is(Kind::List),
        }
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, _: usize, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: usize,
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.next() {
            Some((Step::Key(key), inside)) => {
                visitor.visit_map(Keys { keys: vec![key], value: inside })
            }
            _ => self.is(Kind::Map),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        if let Some((Step::Key(key), inside)) = self.next() {
            return visitor.visit_map(Keys { keys: vec![key], value: inside });
        }
        if self.path.is_empty() {
            self.found.kind.set(Some(Kind::Struct { name, fields }));
            // Never a value: lists would go on for ever.
            visitor.visit_map(Given(self.given.to_vec()))?;
        }
        self.is(Kind::Struct { name, fields })
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        match self.next() {
            Some((Step::Variant(variant), inside)) => {
                visitor.visit_enum(Variant { name: variant, value: inside })
            }
            _ => self.is(Kind::Enum(variants)),
        }
    }
}

/// A list whose only element lies on the way.
struct Elements<'a>(Trace<'a>);

impl<'de> SeqAccess<'de> for Elements<'_> {
    type Error = Error;

    fn next_element_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, Error> {
        seed.deserialize(self.0).map(Some)
    }
}

/// A table of which one key lies on the way.
struct Keys<'a> {
    keys: Vec<&'static str>,
    value: Trace<'a>,
}

impl<'de> MapAccess<'de> for Keys<'_> {
    type Error = Error;

    fn next_key_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, Error> {
        self.keys.pop().map(|key| seed.deserialize(key.into_deserializer())).transpose()
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, Error> {
        seed.deserialize(self.value)
    }
}

/// The keys of a structure that are there.
struct Given(Vec<&'static str>);

impl<'de> MapAccess<'de> for Given {
    type Error = Error;

    fn next_key_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, Error> {
        self.0.pop().map(|key| seed.deserialize(key.into_deserializer())).transpose()
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, Error> {
        seed.deserialize(Any)
    }
}

/// Some value of whatever is asked for.
struct Any;

impl<'de> Deserializer<'de> for Any {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_u64(1)
    }

    fn deserialize_f32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_f32(1.0)
    }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_f64(1.0)
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_bool(true)
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_str("1")
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_seq(serde::de::value::SeqDeserializer::new(std::iter::empty::<u64>()))
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_enum(variants[0].into_deserializer())
    }

    serde::forward_to_deserialize_any! {
        i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 char str bytes byte_buf option unit unit_struct
        tuple tuple_struct map struct identifier ignored_any
    }
}

/// A variant on the way.
struct Variant<'a> {
    name: &'static str,
    value: Trace<'a>,
}

impl<'de> EnumAccess<'de> for Variant<'_> {
    type Error = Error;
    type Variant = Self;

    fn variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<(S::Value, Self), Error> {
        Ok((seed.deserialize(self.name.into_deserializer())?, self))
    }
}

impl<'de> VariantAccess<'de> for Variant<'_> {
    type Error = Error;

    fn unit_variant(self) -> Result<(), Error> {
        self.value.found.word.set(self.value.path.is_empty());
        self.value.is(Kind::Anything)
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<S::Value, Error> {
        seed.deserialize(self.value)
    }

    fn tuple_variant<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, Error> {
        self.value.deserialize_tuple(len, visitor)
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.value.deserialize_struct("", fields, visitor)
    }
}
