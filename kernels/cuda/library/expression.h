// Integer expressions of the op table (ops.txt), evaluated over any algebra: numbers here, TensorRT's symbolic
// dimensions in the plugin, Python's in runtimes/tensorrt_ops.py. The grammar is a part of Python's:
//
//     comparison  ->  sum (("==" | "<=" | "<") sum)?         1 or 0
//     sum         ->  product (("+" | "-") product)*
//     product     ->  atom (("*" | "//" | "%") atom)*        // and % of numbers that are not negative
//     atom        ->  number | name | function "(" comparison ("," comparison)* ")" | "(" comparison ")"
//     function    ->  max | min | ceil_div | one_of          one_of(x, a, b): x is a or b
#pragma once

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace edge {

/// What the user of an op did wrong, in a sentence that names op and tensor or attribute.
struct Refusal : std::runtime_error {
    using runtime_error::runtime_error;
};

enum class Operation { add, subtract, multiply, divide, ceil_divide, minimum, maximum, equal, less };

/// Numbers; a dimension that is not known yet makes the result unknown.
struct Integers {
    using Value = int64_t;
    static constexpr Value UNKNOWN = INT64_MIN;

    static Value constant(int64_t value) { return value; }
    static Value apply(Operation operation, Value a, Value b) {
        if (a == UNKNOWN || b == UNKNOWN) return UNKNOWN;
        Value result = 0;
        bool fits = true;
        switch (operation) {
        case Operation::add: fits = !__builtin_add_overflow(a, b, &result); break;
        case Operation::subtract: fits = !__builtin_sub_overflow(a, b, &result); break;
        case Operation::multiply: fits = !__builtin_mul_overflow(a, b, &result); break;
        case Operation::divide:
        case Operation::ceil_divide:
            if (b < 1 || a < 0) throw Refusal(std::to_string(a) + " cannot be divided by " + std::to_string(b));
            result = a / b + (operation == Operation::ceil_divide && a % b);
            break;
        case Operation::minimum: result = std::min(a, b); break;
        case Operation::maximum: result = std::max(a, b); break;
        case Operation::equal: result = a == b; break;
        case Operation::less: result = a < b; break;
        }
        if (!fits || result == UNKNOWN) throw Refusal("a size passes 64 bits");
        return result;
    }
};

/// Evaluates one text. `Names` gives the value of a name, or throws.
template <class Algebra, class Names>
class Evaluator {
public:
    using Value = typename Algebra::Value;

    Evaluator(const std::string& text, Algebra& algebra, const Names& names)
        : text_(text), algebra_(algebra), names_(names) {}

    Value operator()() {
        const Value value = comparison();
        if (skip() < text_.size()) fail();
        return value;
    }

private:
    Value comparison() {
        const Value left = sum();
        if (take("==")) return algebra_.apply(Operation::equal, left, sum());
        if (take("<=")) return algebra_.apply(Operation::less, left, apply(Operation::add, sum(), 1));
        if (take("<")) return algebra_.apply(Operation::less, left, sum());
        return left;
    }

    Value sum() {
        Value value = product();
        for (;;) {
            if (take("+")) {
                value = algebra_.apply(Operation::add, value, product());
            } else if (take("-")) {
                value = algebra_.apply(Operation::subtract, value, product());
            } else {
                return value;
            }
        }
    }

    Value product() {
        Value value = atom();
        for (;;) {
            if (take("*")) {
                value = algebra_.apply(Operation::multiply, value, atom());
            } else if (take("//")) {
                value = algebra_.apply(Operation::divide, value, atom());
            } else if (take("%")) {
                const Value by = atom();
                const Value whole =
                    algebra_.apply(Operation::multiply, algebra_.apply(Operation::divide, value, by), by);
                value = algebra_.apply(Operation::subtract, value, whole);
            } else {
                return value;
            }
        }
    }

    Value atom() {
        if (take("(")) {
            const Value value = comparison();
            if (!take(")")) fail();
            return value;
        }
        const std::string word = this->word();
        if (word.empty()) fail();
        if (std::isdigit(static_cast<unsigned char>(word[0]))) return algebra_.constant(std::stoll(word));
        return take("(") ? function(word) : names_(word);
    }

    Value function(const std::string& name) {
        std::vector<Value> values{comparison()};
        while (take(",")) values.push_back(comparison());
        if (!take(")") || values.size() < 2) fail();
        if (name == "one_of") {
            Value found = algebra_.apply(Operation::equal, values[0], values[1]);
            for (size_t i = 2; i < values.size(); ++i)
                found =
                    algebra_.apply(Operation::maximum, found, algebra_.apply(Operation::equal, values[0], values[i]));
            return found;
        }
        if (values.size() > 2) fail();
        if (name == "max") return algebra_.apply(Operation::maximum, values[0], values[1]);
        if (name == "min") return algebra_.apply(Operation::minimum, values[0], values[1]);
        if (name != "ceil_div") fail();
        return algebra_.apply(Operation::ceil_divide, values[0], values[1]);
    }

    Value apply(Operation operation, Value a, int64_t b) { return algebra_.apply(operation, a, algebra_.constant(b)); }

    size_t skip() {
        while (at_ < text_.size() && text_[at_] == ' ') ++at_;
        return at_;
    }

    bool take(const std::string& token) {
        if (text_.compare(skip(), token.size(), token)) return false;
        at_ += token.size();
        return true;
    }

    std::string word() {
        const size_t from = skip();
        while (at_ < text_.size() &&
               (std::isalnum(static_cast<unsigned char>(text_[at_])) || text_[at_] == '_' || text_[at_] == '.'))
            ++at_;
        return text_.substr(from, at_ - from);
    }

    [[noreturn]] void fail() const {
        throw std::logic_error("ops.txt: '" + text_ + "' cannot be read at character " + std::to_string(at_));
    }

    const std::string& text_;
    Algebra& algebra_;
    const Names& names_;
    size_t at_ = 0;
};

template <class Algebra, class Names>
typename Algebra::Value evaluate(const std::string& text, Algebra& algebra, const Names& names) {
    return Evaluator<Algebra, Names>(text, algebra, names)();
}

}  // namespace edge
